# Training on NVIDIA GPUs.
#
#   docker build -f docker/cuda.Dockerfile -t grass_ds:cuda .
#   docker run --rm -it --gpus all --ipc=host --ulimit memlock=-1 grass_ds:cuda python -m grass_ds doctor
#
# memlock: Adam state in page-locked host memory. ipc: NCCL talks between GPUs through shared memory. For state on NVMe
# mount a local disk: -v /local/disk:/nvme, and "nvme_path": "/nvme".
#
# CUDA must be the version that torch of launch/constraints.txt is built with (torch.version.cuda), at least in its major
# number: DeepSpeed compiles its C++ and CUDA code with the nvcc of this image and refuses another.
ARG CUDA=13.0.2
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04

RUN apt-get update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        g++ libaio-dev numactl python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# Before the sources: a change of them installs nothing again. torch is first, because DeepSpeed's set-up looks for it.
WORKDIR /opt/grass_ds
COPY launch/constraints.txt launch/
RUN pip install --constraint launch/constraints.txt torch setuptools ninja packaging
RUN pip install --no-build-isolation --constraint launch/constraints.txt \
        deepspeed transformers accelerate datasets matplotlib peft

COPY . .
RUN pip install --no-build-isolation --constraint launch/constraints.txt '.[launch,peft]'
CMD ["python", "-m", "grass_ds", "doctor"]
