# Training and tests on the CPU.
#
#   docker build -f docker/cpu.Dockerfile -t grass_ds:cpu .
#   docker run --rm -it --shm-size=2g grass_ds:cpu torchrun --nproc_per_node 2 -m grass_ds doctor
#
# pip's default torch brings CUDA libraries of a few GB. TORCH_INDEX, an index with CPU builds, avoids them:
#   --build-arg TORCH_INDEX=<address>
FROM python:3.12-slim-bookworm

# g++ compiles DeepSpeed's C++ code at the first start, libaio is for optimizer state on NVMe.
RUN apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends g++ libaio-dev numactl \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/grass_ds
ENV DS_ACCELERATOR=cpu PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# Before the sources: a change of them installs nothing again. torch is first, because DeepSpeed's set-up looks for it.
COPY launch/constraints.txt launch/
ARG TORCH_INDEX=""
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --constraint launch/constraints.txt torch \
    && pip install --constraint launch/constraints.txt setuptools ninja packaging
RUN pip install --no-build-isolation --constraint launch/constraints.txt \
        deepspeed transformers accelerate datasets matplotlib peft

COPY . .
RUN pip install --no-build-isolation --constraint launch/constraints.txt '.[launch,peft]'
CMD ["python", "-m", "grass_ds", "doctor"]
