"""What a step costs on paper, and what its collectives move."""
