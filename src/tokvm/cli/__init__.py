"""What can the operator do? One module per verb."""
