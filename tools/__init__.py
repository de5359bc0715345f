"""Programs beside the lesson: speed beside torch's layers, tables over seeds."""
