"""What runs beside the trainer, in its environment: light, without the judge.  `main` is where it starts."""
