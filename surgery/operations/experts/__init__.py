"""What the operations on experts share: cutting them out of a checkpoint, and measuring how they are used."""
