"""The recurrent pooling: its definition, its kernels, and the function `pool` that chooses among them."""
