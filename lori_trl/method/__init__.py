"""The paper, on tensors alone: which layers, the frozen A, saliency, the mask, and training B on it."""
