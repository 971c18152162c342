//! A real TPM (swtpm), and what we make of it, judged by tpm2-tools.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::thread;
use std::time::Duration;

use base16ct::lower;
use common::Random;
use common::swtpm::Swtpm;
use sealblk::tpm::attest::{Attested, RsaPublic, is_of_another_tpm};
use sealblk::tpm::{Device, Tpm, TpmError, TpmFailure, object_name};
use sealblk_secmem::arena::SecretBytes;

fn open(tpm: &Swtpm) -> Tpm {
    Tpm::open(&Device::from(tpm.device())).unwrap()
}

fn changed(error: &TpmError) -> &'static str {
    match error.what {
        TpmFailure::Changed(what) => what,
        ref other => panic!("{other:?}"),
    }
}

#[test]
fn a_sealed_secret_comes_back_until_a_register_changes() {
    let mut swtpm = Swtpm::new();
    let secret = SecretBytes::random(32).unwrap();
    let sealed = open(&swtpm).seal(&secret, "0,7".parse().unwrap()).unwrap();
    assert!(open(&swtpm).unseal(&sealed).unwrap().ct_eq(&secret));
    // Of the secret, nothing is in what is kept.
    let text = serde_json::to_string(&sealed).unwrap();
    assert_eq!(
        serde_json::from_str::<sealblk::tpm::seal::Sealed>(&text).unwrap(),
        sealed
    );

    // Nothing is left in the TPM that would fill it.
    for _ in 0..20 {
        assert!(open(&swtpm).unseal(&sealed).unwrap().ct_eq(&secret));
    }
    swtpm.extend(4);
    assert!(open(&swtpm).unseal(&sealed).unwrap().ct_eq(&secret));
    swtpm.extend(7);
    let error = open(&swtpm).unseal(&sealed).unwrap_err();
    assert!(changed(&error).contains("registers"), "{error}");
    // A host that boots as it did has the registers of then.
    swtpm.stop();
    swtpm.start();
    assert!(open(&swtpm).unseal(&sealed).unwrap().ct_eq(&secret));

    let error = open(&Swtpm::new()).unseal(&sealed).unwrap_err();
    assert!(changed(&error).contains("another TPM"), "{error}");
    swtpm.tool("clear", &[]);
    let error = open(&swtpm).unseal(&sealed).unwrap_err();
    assert!(changed(&error).contains("cleared"), "{error}");
}

#[test]
fn a_sealed_secret_that_was_altered_does_not_come_back() {
    let swtpm = Swtpm::new();
    let secret = SecretBytes::random(32).unwrap();
    let sealed = open(&swtpm).seal(&secret, "7".parse().unwrap()).unwrap();
    let text = serde_json::to_string(&sealed).unwrap();
    let mut random = Random::new(1);
    for _ in 0..40 {
        let mut bytes = text.clone().into_bytes();
        let at = (random.number() % bytes.len() as u64) as usize;
        bytes[at] = match bytes[at] {
            b'A' => b'B',
            byte if byte.is_ascii_alphanumeric() => b'A',
            byte => byte ^ 1,
        };
        let Ok(altered) = serde_json::from_slice::<sealblk::tpm::seal::Sealed>(&bytes) else {
            continue;
        };
        // Whoever keeps it only for a while begins anew.
        let error = open(&swtpm).unseal(&altered).unwrap_err();
        assert!(
            matches!(error.what, TpmFailure::Changed(_)),
            "{error}: {}",
            String::from_utf8_lossy(&bytes)
        );
    }
    assert!(open(&swtpm).unseal(&sealed).unwrap().ct_eq(&secret));
}

#[test]
fn quotes_hold_for_tpm2_checkquote_and_registers_are_those_of_tpm2_pcrread() {
    let swtpm = Swtpm::new();
    swtpm.extend(4);
    let key = open(&swtpm).create_attestation_key().unwrap();
    let quote = open(&swtpm)
        .quote(&key, b"once", "0,4,7".parse().unwrap())
        .unwrap();
    assert_eq!(quote.pcrs[0], [0; 32]);
    assert_ne!(quote.pcrs[4], [0; 32]);
    let attested = Attested::parse(&quote.message).unwrap();
    assert_eq!(attested.qualifying, b"once");
    assert_eq!(attested.digest, attested.pcrs.digest(&quote.pcrs));

    // TPM2B_PUBLIC, which tpm2_print makes a PEM of; the values of the registers one after the other.
    let public = [&(key.public.len() as u16).to_be_bytes()[..], &key.public].concat();
    fs::write(swtpm.path("ak.pub"), public).unwrap();
    fs::write(swtpm.path("message"), &quote.message).unwrap();
    fs::write(swtpm.path("signature"), &quote.signature).unwrap();
    swtpm.tool("print", &["--type", "TPM2B_PUBLIC", "--format", "pem", "ak.pub"]);
    let mut print = std::process::Command::new("tpm2_print");
    let pem = common::volume::run(print.current_dir(swtpm.path("")).args([
        "-t",
        "TPM2B_PUBLIC",
        "-f",
        "pem",
        "ak.pub",
    ]));
    fs::write(swtpm.path("ak.pem"), pem.stdout).unwrap();
    swtpm.tool("pcrread", &["sha256:0,4,7", "--output", "pcrs"]);
    let read = fs::read(swtpm.path("pcrs")).unwrap();
    assert_eq!(read, [0, 4, 7].map(|register| quote.pcrs[register]).concat());
    let check = [
        "--public",
        "ak.pem",
        "--message",
        "message",
        "--signature",
        "signature",
    ];
    let check = [
        &check[..],
        &[
            "--pcr",
            "pcrs",
            "--pcr-list",
            "sha256:0,4,7",
            "--hash-algorithm",
            "sha256",
        ],
    ]
    .concat();
    swtpm.tool(
        "checkquote",
        &[&check[..], &["--qualification", &lower::encode_string(b"once")]].concat(),
    );

    // The same key, loaded by another TPM, is refused.
    let error = open(&Swtpm::new())
        .quote(&key, b"once", "0".parse().unwrap())
        .unwrap_err();
    assert!(is_of_another_tpm(&error), "{error}");
}

#[test]
fn credentials_of_tpm2_makecredential_are_activated_and_those_for_others_are_not() {
    let swtpm = Swtpm::new();
    let ek = open(&swtpm).endorsement_key().unwrap();
    let key = open(&swtpm).create_attestation_key().unwrap();
    RsaPublic::endorsement(&ek.public).unwrap();
    RsaPublic::attestation(&key.public).unwrap();
    RsaPublic::attestation(&ek.public).unwrap_err();
    RsaPublic::endorsement(&key.public).unwrap_err();

    // The maker's certificate holds, and is for the same key.
    fs::write(swtpm.path("ek.der"), ek.certificate.as_ref().unwrap()).unwrap();
    swtpm.tool(
        "createek",
        &[
            "--key-algorithm",
            "rsa",
            "--ek-context",
            "ek.ctx",
            "--public",
            "ek.pub",
        ],
    );
    let theirs = fs::read(swtpm.path("ek.pub")).unwrap();
    assert_eq!(theirs[2..], ek.public);
    let mut x509 = std::process::Command::new("openssl");
    x509.current_dir(swtpm.path(""));
    common::volume::run(x509.args(["x509", "-inform", "DER", "-in", "ek.der", "-noout"]));

    fs::write(swtpm.path("secret"), b"released").unwrap();
    let make = |name: &[u8]| {
        let args = [
            "--tcti",
            "none",
            "--encryption-key",
            "ek.pub",
            "--secret",
            "secret",
        ];
        let name = lower::encode_string(name);
        let args = [&args[..], &["--name", &name, "--credential-blob", "credential"]].concat();
        swtpm.tool("makecredential", &args);
        // A magic number and a version, then TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET.
        let bytes = fs::read(swtpm.path("credential")).unwrap();
        let sized = |at: usize| {
            let len = usize::from(u16::from_be_bytes([bytes[at], bytes[at + 1]]));
            bytes[at + 2..at + 2 + len].to_vec()
        };
        let credential = sized(8);
        let secret = sized(8 + 2 + credential.len());
        (credential, secret)
    };
    let (credential, secret) = make(&object_name(&key.public));
    let activated = open(&swtpm).activate(&key, &credential, &secret).unwrap();
    assert_eq!(&activated[..], b"released");

    let other = open(&swtpm).create_attestation_key().unwrap();
    open(&swtpm).activate(&other, &credential, &secret).unwrap_err();
    let elsewhere = Swtpm::new();
    let theirs = open(&elsewhere).create_attestation_key().unwrap();
    open(&elsewhere)
        .activate(&theirs, &credential, &secret)
        .unwrap_err();
}

/// Somebody has guessed passwords of other objects; ours are empty, and there is nothing to guess.
#[test]
fn a_tpm_that_is_locked_out_quotes_and_unseals_and_quotes_do_not_lock_it_out() {
    let mut swtpm = Swtpm::new();
    let secret = SecretBytes::random(32).unwrap();
    let sealed = open(&swtpm).seal(&secret, "7".parse().unwrap()).unwrap();
    let key = open(&swtpm).create_attestation_key().unwrap();
    let quote = |swtpm: &Swtpm| open(swtpm).quote(&key, b"once", "7".parse().unwrap());

    let failed_tries = |swtpm: &Swtpm| {
        let properties = swtpm.output("getcap", &["properties-variable"]);
        let counter = properties
            .lines()
            .find_map(|line| line.strip_prefix("TPM2_PT_LOCKOUT_COUNTER: "));
        counter.unwrap().to_owned()
    };
    // A power cut counts as a guess, if a key was used that can be guessed.
    let power_cut = |swtpm: &mut Swtpm| {
        swtpm.stop();
        swtpm.start();
        failed_tries(swtpm)
    };
    quote(&swtpm).unwrap();
    assert_eq!(power_cut(&mut swtpm), "0x0");

    let most = [
        "--max-tries",
        "1",
        "--recovery-time",
        "1000",
        "--lockout-recovery-time",
        "1000",
    ];
    swtpm.tool(
        "dictionarylockout",
        &[&["--setup-parameters"], &most[..]].concat(),
    );
    let attributes = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|sign";
    let make = [
        "--key-context",
        "theirs",
        "--key-algorithm",
        "ecc",
        "--key-auth",
        "theirs",
        "--attributes",
        attributes,
    ];
    swtpm.tool("createprimary", &make);
    fs::write(swtpm.path("message"), b"message").unwrap();
    let sign = [
        "--key-context",
        "theirs",
        "--auth",
        "theirs",
        "--signature",
        "signature",
        "message",
    ];
    swtpm.tool("sign", &sign);
    assert_eq!(power_cut(&mut swtpm), "0x1");
    assert!(
        swtpm
            .output("getcap", &["properties-variable"])
            .contains("inLockout:                 1")
    );
    quote(&swtpm).unwrap();
    assert!(open(&swtpm).unseal(&sealed).unwrap().ct_eq(&secret));
}

/// As where the kernel measures each program that is started, into a register that nothing is bound to.
#[test]
fn a_register_that_is_extended_while_a_secret_is_unsealed_does_not_keep_it_back() {
    const UNSEAL: [u8; 4] = 0x15e_u32.to_be_bytes();
    const OFTEN: usize = 3;
    let swtpm = Swtpm::new();
    let secret = SecretBytes::random(32).unwrap();
    let sealed = open(&swtpm).seal(&secret, "7".parse().unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("between");
    let listener = UnixListener::bind(&path).unwrap();
    let behind = swtpm.path("tpm.sock");
    // TPM2_PCR_Extend of register 10 by the empty password: one digest, of SHA-256.
    let extend = [
        &[0x80, 2, 0, 0, 0, 65, 0, 0, 1, 0x82, 0, 0, 0, 10][..],
        &[0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0],
        &[0, 0, 0, 1, 0, 0x0b],
        &[0x5a; 32],
    ]
    .concat();
    let relay = thread::spawn(move || {
        let (mut before, _) = listener.accept().unwrap();
        let mut behind = std::os::unix::net::UnixStream::connect(behind).unwrap();
        let mut buffer = vec![0; 4096];
        let mut unseals = 0;
        while let Ok(read @ 1..) = before.read(&mut buffer) {
            let unseal = buffer[6..10] == UNSEAL;
            unseals += usize::from(unseal);
            if unseal && unseals <= OFTEN {
                let mut answer = [0; 64];
                behind.write_all(&extend).unwrap();
                assert!(behind.read(&mut answer).unwrap() > 10 && answer[6..10] == [0; 4]);
            }
            behind.write_all(&buffer[..read]).unwrap();
            let read = behind.read(&mut buffer).unwrap();
            before.write_all(&buffer[..read]).unwrap();
        }
        unseals
    });
    let device = Device::from(format!("swtpm:path={}", path.display()));
    assert!(
        Tpm::open(&device)
            .unwrap()
            .unseal(&sealed)
            .unwrap()
            .ct_eq(&secret)
    );
    assert_eq!(relay.join().unwrap(), OFTEN + 1);
}

#[test]
fn a_certificate_ends_where_it_says_though_the_tpm_has_room_for_more() {
    let swtpm = Swtpm::new();
    let certificate = open(&swtpm).endorsement_key().unwrap().certificate.unwrap();
    let room = [&certificate[..], &[0xff; 700]].concat();
    fs::write(swtpm.path("room"), &room).unwrap();
    swtpm.tool("nvundefine", &["0x1c00002", "--hierarchy", "p"]);
    let size = room.len().to_string();
    let attributes = "ppwrite|ppread|ownerread|authread|no_da|platformcreate";
    swtpm.tool(
        "nvdefine",
        &[
            "0x1c00002",
            "--hierarchy",
            "p",
            "--size",
            &size,
            "--attributes",
            attributes,
        ],
    );
    swtpm.tool("nvwrite", &["0x1c00002", "--hierarchy", "p", "--input", "room"]);
    assert_eq!(
        open(&swtpm).endorsement_key().unwrap().certificate,
        Some(certificate)
    );

    swtpm.tool("nvundefine", &["0x1c00002", "--hierarchy", "p"]);
    assert_eq!(open(&swtpm).endorsement_key().unwrap().certificate, None);
}

/// What answers is no TPM, or one that somebody stands in front of.
#[test]
fn answers_that_are_hostile_are_errors() {
    let swtpm = Swtpm::new();
    let sealed = open(&swtpm)
        .seal(&SecretBytes::random(32).unwrap(), "7".parse().unwrap())
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("between");
    let listener = UnixListener::bind(&path).unwrap();
    let mut random = Random::new(2);
    let runs = 60;
    // A relay that spoils one byte of one answer.
    let behind = swtpm.path("tpm.sock");
    let relay = thread::spawn(move || {
        for _ in 0..runs {
            let (mut before, _) = listener.accept().unwrap();
            // Whoever waits for more of a spoilt answer is told that there is none.
            before.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            let mut behind = std::os::unix::net::UnixStream::connect(&behind).unwrap();
            let spoil = random.number() % 14;
            let mut answers = 0;
            let mut buffer = vec![0; 8192];
            while let Ok(read @ 1..) = before.read(&mut buffer) {
                behind.write_all(&buffer[..read]).unwrap();
                let read = behind.read(&mut buffer).unwrap();
                if answers == spoil {
                    let at = random.number() as usize % read;
                    buffer[at] ^= 1 << (random.number() % 8);
                }
                answers += 1;
                if before.write_all(&buffer[..read]).is_err() {
                    break;
                }
            }
            // What was spoilt may not have been flushed.
            for handle in [0x8000_0000_u32, 0x0200_0000, 0x0300_0000]
                .into_iter()
                .flat_map(|first| first..first + 3)
            {
                let flush = [&[0x80, 1, 0, 0, 0, 14, 0, 0, 1, 0x65][..], &handle.to_be_bytes()].concat();
                behind.write_all(&flush).unwrap();
                assert_eq!(behind.read(&mut buffer).unwrap(), 10);
            }
        }
    });
    let device = Device::from(format!("swtpm:path={}", path.display()));
    let mut failed = 0;
    for _ in 0..runs {
        let mut tpm = Tpm::open(&device).unwrap();
        failed += u32::from(tpm.unseal(&sealed).is_err());
    }
    relay.join().unwrap();
    assert!(failed > 10, "{failed} of {runs}");
}

/// Whoever could have us encrypt to a point of theirs would read what the TPM unseals: the Name that we know has to be that point's.
#[test]
fn a_storage_key_under_the_name_of_another_is_refused() {
    const CREATE_PRIMARY: [u8; 4] = 0x131_u32.to_be_bytes();
    let (swtpm, other) = (Swtpm::new(), Swtpm::new());
    let sealed = open(&swtpm)
        .seal(&SecretBytes::random(32).unwrap(), "7".parse().unwrap())
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("between");
    let listener = UnixListener::bind(&path).unwrap();
    let (real, theirs) = (swtpm.path("tpm.sock"), other.path("tpm.sock"));
    let relay = thread::spawn(move || {
        let (mut before, _) = listener.accept().unwrap();
        let [mut real, mut theirs] =
            [real, theirs].map(|path| std::os::unix::net::UnixStream::connect(path).unwrap());
        let (mut buffer, mut others) = (vec![0; 4096], vec![0; 4096]);
        while let Ok(read @ 1..) = before.read(&mut buffer) {
            let creates = buffer[6..10] == CREATE_PRIMARY;
            real.write_all(&buffer[..read]).unwrap();
            if creates {
                theirs.write_all(&buffer[..read]).unwrap();
                assert!(theirs.read(&mut others).unwrap() > 100);
            }
            let read = real.read(&mut buffer).unwrap();
            if creates {
                // After the header, the handle and the length of all parameters: the public part, which ends with its point.
                let public = 20..20 + usize::from(u16::from_be_bytes([buffer[18], buffer[19]]));
                assert_ne!(buffer[public.clone()], others[public.clone()]);
                buffer[public.clone()].copy_from_slice(&others[public]);
            }
            before.write_all(&buffer[..read]).unwrap();
        }
    });
    let device = Device::from(format!("swtpm:path={}", path.display()));
    let error = Tpm::open(&device).unwrap().unseal(&sealed).unwrap_err();
    assert!(
        matches!(error.what, TpmFailure::Garbled { what, .. } if what.contains("the Name does not belong to the key")),
        "{error:?}"
    );
    relay.join().unwrap();
}
