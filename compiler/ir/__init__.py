"""The intermediate representation: Program, ops, lazy weights, invariants, and the interpreter that defines them."""
