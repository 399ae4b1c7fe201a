"""Hand-written oracles: token reduction methods in plain torch, on whole models, independent of the compiler."""
