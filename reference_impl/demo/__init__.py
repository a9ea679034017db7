"""Does training recover a reward that is known?  A small world, end to end: python -m reference_impl.demo"""
