"""Which α, λ, divergence and temperature: `amid-trl landscape`."""
