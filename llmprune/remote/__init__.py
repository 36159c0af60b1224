"""Code that travels with results whose blocks differ; each file stands alone."""
