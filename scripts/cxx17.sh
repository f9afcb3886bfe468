#!/usr/bin/env bash
# g++ for Horovod's build: Horovod 0.28.1 asks for C++14, PyTorch's headers want C++17 since 2.1.
exec g++ "${@/#-std=c++14/-std=c++17}"
