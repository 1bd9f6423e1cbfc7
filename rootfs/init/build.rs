//! Leaves symbols and debug information out of `init`: the guest unpacks every byte of it at boot (28 ms of 162 ms
//! with them), and nobody debugs there.
fn main() {
    println!("cargo:rustc-link-arg-bins=-Wl,--strip-all");
    println!("cargo:rerun-if-changed=build.rs");
}
