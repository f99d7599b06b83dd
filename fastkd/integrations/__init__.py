"""fastkd in the trainers that people have, a file each."""
