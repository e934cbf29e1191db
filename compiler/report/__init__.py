"""What people and programs read about a model or an artifact."""
