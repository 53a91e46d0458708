"""AMiDTrainer and AMiDConfig, and the parts that they are made of."""
