"""Which trainers are right though they are written differently?"""
