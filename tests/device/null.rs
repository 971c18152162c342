//! Null storage: all that sealblk does for a request, with no storage under it.

use common::driver::{
    Data, F_CONFIG_WCE, F_FLUSH, S_OK, Setup, T_DISCARD, T_FLUSH, T_IN, T_OUT, T_WRITE_ZEROES,
};
use common::pattern;
use common::serve::{Server, sealblk_path};
use std::collections::HashSet;
use std::process::Command;

#[test]
fn null_storage_answers_everything_and_reads_give_noise_of_the_cipher() {
    for (sector_size, plain) in [(512, false), (4096, false), (512, true), (4096, true)] {
        let bytes = sector_size.to_string();
        let mut args = vec!["--sector-size", &bytes, "--discard"];
        args.extend(plain.then_some("--allow-unencrypted"));
        let server = Server::null("64G", &args);
        let mut driver = server.connect();
        assert_eq!(driver.capacity(), 64 << 21);
        assert_eq!(
            driver.frontend.config(20, 4).unwrap(),
            u32::to_le_bytes(sector_size)
        );
        let data = pattern(1, 1 << 20);
        let last = driver.capacity() - 2048;
        for sector in [0, 8 * 12_345, last] {
            let written = driver.run(T_OUT, sector, Data::Out(&data));
            assert_eq!((written.status, written.used_len), (S_OK, 1));
            assert_eq!(driver.run(T_FLUSH, 0, Data::None).status, S_OK);
            let read = driver.run(T_IN, sector, Data::In(data.len()));
            assert_eq!((read.status, read.used_len), (S_OK, (1 << 20) + 1));
        }
        for kind in [T_WRITE_ZEROES, T_DISCARD] {
            assert_eq!(driver.run_ranges(kind, &[(0, 2048, 0)]).status, S_OK);
        }
        // The buffers hold zeros by now. Under a cipher no two sectors of them read the same.
        let read = driver.run(T_IN, 1 << 20, Data::In(1 << 20)).data;
        let blocks: HashSet<&[u8]> = read.chunks(sector_size as usize).collect();
        assert!(plain || blocks.len() == read.len() / sector_size as usize);
        drop(driver);

        // A driver that does not know flushes: every write is synchronous.
        let features = !(F_FLUSH | F_CONFIG_WCE);
        let mut driver = server.connect_with(Setup {
            features,
            ..Setup::default()
        });
        assert_eq!(driver.run(T_OUT, 0, Data::Out(&data)).status, S_OK);
        drop(driver);
        let ended = server.stop();
        let told = format!("encrypted={}", !plain);
        assert!(
            ended.stderr.contains("null storage") && ended.stderr.contains(&told),
            "{}",
            ended.stderr
        );
    }
}

#[test]
fn what_makes_no_sense_with_null_storage_is_refused() {
    for args in [
        &["--blk-file", "/dev/null"][..],
        &["--header", "/dev/null"],
        &["--passphrase-file", "/dev/null"],
        &["--sector-size", "1024"],
        &["--null-storage", "1G"],
    ] {
        refused("1G", args, args[0]);
    }
    refused("0", &[], "--null-storage");
    refused("4608", &["--sector-size", "4096"], "4096");
}

fn refused(size: &str, args: &[&str], says: &str) {
    let mut serve = Command::new(sealblk_path());
    serve.args([
        "serve",
        "--socket-path",
        "/nonexistent/socket",
        "--null-storage",
        size,
    ]);
    let output = serve.args(args).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
    assert!(said.contains(says), "{args:?}: {said}");
}
