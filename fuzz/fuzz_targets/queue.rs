//! Drivers that do anything with a virtqueue: `ci/campaign fuzz`. See `src/serve/device/hostile/queue.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| sealblk::device::hostile::queue(input));
