"""Many processes and devices: how they meet, the mesh, saving together."""
