//! Tokens a second from signal to keep mask.

fn main() {
    divan::main();
}
