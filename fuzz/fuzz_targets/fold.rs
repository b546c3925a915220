#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| prefold_fuzz::fold(bytes));
