"""The study behind `docs/results.md`: the paper's claims, and masks for a tenth of the price, on SmolLM2-135M."""
