"""The compiler: one pass in each file, from one ``Program`` to the next."""

if __name__ != "dnifx.passes":
    raise ImportError(f"this package is dnifx.passes; import it so, for as {__name__!r} its classes would be others")
