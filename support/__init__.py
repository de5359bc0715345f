"""What any training script needs, and nothing of the lesson."""
