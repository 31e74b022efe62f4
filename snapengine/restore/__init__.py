"""How pages get back into memory."""
