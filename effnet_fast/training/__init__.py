"""Training, evaluation and prediction: from a folder of images to answers.

Nothing is imported here: each module brings its own packages, and the core's suffice for reading
folders, evaluating and predicting.
"""
