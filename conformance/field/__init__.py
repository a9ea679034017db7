"""How are trainers that none of us wrote audited, each release in an environment of its own?"""
