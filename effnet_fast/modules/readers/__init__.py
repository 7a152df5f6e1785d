"""What modules consist of, by package: each reader fills `structure`'s table with its classes."""
