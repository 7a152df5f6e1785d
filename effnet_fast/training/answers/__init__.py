"""What a trained network says: evaluation, and predictions of many images into a file."""
