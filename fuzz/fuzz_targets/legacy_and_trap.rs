#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| picovm_fuzz::legacy_and_trap(data));
