"""Exchange of rows between the experts of several GPUs of one host, by reading the peers' memory.

``buffers`` lays out what ranks show each other, ``triton`` holds the kernels that read it, ``mlp`` the expert MLP on
rows of which only the device knows how many there are. Imports no ``torch.distributed``: whoever allocates memory that
peers can read, and makes ranks wait for each other, is in the runtime. So one process can play all ranks in a test.
"""
