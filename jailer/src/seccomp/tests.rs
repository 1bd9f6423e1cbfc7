use super::*;

#[test]
fn every_list_compiles() {
    Filters::new(&Seccomp::default()).unwrap();
}
