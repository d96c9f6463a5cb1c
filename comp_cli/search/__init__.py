"""From a dense model to a plan and the weights of its model."""
