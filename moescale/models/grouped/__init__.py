"""What families with grouped-query attention share: configuration, tensor names, operators. Imports no torch.

The module is :class:`moescale.models.blocks.gqa.GroupedQueryAttention`.
"""
