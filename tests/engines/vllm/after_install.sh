# vLLM asks for these by name and gets builds for CUDA, which a torch for the CPU cannot load; text needs none of them.
pip uninstall --quiet --yes torchvision torchaudio torchcodec
