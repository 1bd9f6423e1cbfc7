//! Leaves symbols and debug information out of the hostile `init`, as for the good one.
fn main() {
    println!("cargo:rustc-link-arg-bin=picovm-hostile-init=-Wl,--strip-all");
    println!("cargo:rerun-if-changed=build.rs");
}
