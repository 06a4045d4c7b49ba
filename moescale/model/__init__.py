"""The DeepSeek-V2 architecture in training form: attention, moe, transformer. No torch.distributed here.

May import: moescale.kernels, moescale.operators, moescale.config, moescale.errors.
"""
