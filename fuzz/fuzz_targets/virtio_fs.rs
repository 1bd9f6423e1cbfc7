#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| picovm_fuzz::virtio_fs(data));
