def write(out, names):
    pass
