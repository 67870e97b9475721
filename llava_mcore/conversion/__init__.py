"""Hugging Face checkpoints to distributed checkpoints and back, tensor by tensor; no model is built.

``import_hf`` and ``export_hf`` live in :mod:`llava_mcore.conversion.convert`; importing this package imports no torch.
"""
