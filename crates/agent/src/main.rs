//! The init and agent inside a virtual machine.
fn main() {}
