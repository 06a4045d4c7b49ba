"""What families with multi-head latent attention share: configuration, config.json, tensor names, operators, model.

``config``, ``hf`` and ``operators`` import no torch; ``model`` does.
"""
