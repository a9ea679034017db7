"""placeholder"""
def write(*a): pass
