# Which Horovod build to use; sourced in the repository's root by scripts/setup.sh, which builds it, and by
# scripts/package_environment.sh. HOROVOD_GPU_OPERATIONS, once given to the set-up, is remembered until it is given
# again (HOROVOD_GPU_OPERATIONS= for the CPU): otherwise the next `make`, from another shell, would put the CPU build
# back into .venv.
gpu=${HOROVOD_GPU_OPERATIONS-$(sed -n 2p .venv/.trailvec-setup 2>/dev/null || true)}
wheels=${XDG_CACHE_HOME:-$HOME/.cache}/trailvec/wheels/torch$(sed -n 's/^torch==\([^ ]*\).*/\1/p' requirements.lock)-cp311-x86_64
wheels+=-${gpu:-CPU}-$(cat requirements-horovod.lock scripts/cxx17.sh | sha256sum | cut -c1-12)
