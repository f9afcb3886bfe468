# Which Horovod: scripts/setup.sh, which builds it, and scripts/package_environment.sh source this in the repository's
# folder. What the set-up was told once holds until it is told otherwise (HOROVOD_GPU_OPERATIONS= for the CPU): else the
# next `make`, in another shell, would put the CPU's build into .venv again.
gpu=${HOROVOD_GPU_OPERATIONS-$(sed -n 2p .venv/.trailvec-setup 2>/dev/null || true)}
wheels=${XDG_CACHE_HOME:-$HOME/.cache}/trailvec/wheels/torch$(sed -n 's/^torch==\([^ ]*\).*/\1/p' requirements.lock)-cp311-x86_64
wheels+=-${gpu:-CPU}-$(cat requirements-horovod.lock scripts/cxx17.sh | sha256sum | cut -c1-12)
