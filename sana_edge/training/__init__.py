"""How sana-tiny was made: scenes drawn by code, captions, and the training of its three networks."""
