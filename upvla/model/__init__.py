"""UP-VLA: one decoder that answers questions about a scene, predicts its future frame, and acts in it."""
