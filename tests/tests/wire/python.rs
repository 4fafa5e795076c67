//! The environment of the Python programs: made once, under the target folder, and again when
//! what it is made of changes.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// Programs, requirements and contract, from the root of the workspace.
const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
/// What the programs need of the contract.
const PROTO: [&str; 3] = [
    "handfast/v1/common.proto",
    "handfast/v1/messages.proto",
    "handfast/v1/business_status.proto",
];

/// An interpreter with everything that the programs import.
#[derive(Debug)]
pub(crate) struct Python {
    interpreter: PathBuf,
    generated: PathBuf,
}

impl Python {
    /// The environment, which the first call makes.
    pub(crate) fn ready() -> &'static Self {
        static READY: OnceLock<Python> = OnceLock::new();
        READY.get_or_init(|| {
            let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
            fs::create_dir_all(folder).unwrap();
            // Another test program of the same target folder waits here.
            let lock = File::create(folder.join("python.lock")).unwrap();
            lock.lock().unwrap();
            Self::made_in(&folder.join("python"))
        })
    }

    /// The command that runs one of the programs in `tests/python`.
    pub(crate) fn program(&self, name: &str) -> Command {
        let mut command = Command::new(&self.interpreter);
        command
            .arg(Path::new(ROOT).join("tests/python").join(name))
            .env("PYTHONPATH", &self.generated)
            .env("PYTHONDONTWRITEBYTECODE", "1");
        command
    }

    fn made_in(folder: &Path) -> Self {
        let python = Self {
            interpreter: folder.join("bin/python"),
            generated: folder.join("generated"),
        };
        let mark = folder.join("made-of");
        let made_of = made_of();
        if fs::read_to_string(&mark).is_ok_and(|before| before == made_of) {
            return python;
        }
        if folder.exists() {
            fs::remove_dir_all(folder).unwrap();
        }
        run(
            "make an environment for Python; install Python 3.9 or later with its module venv, \
             for example with: sudo apt-get install python3-venv",
            Command::new("python3").arg("-m").arg("venv").arg(folder),
        );
        run(
            "install what tests/python/requirements.txt names",
            // A package that would have to be compiled is one that this platform does not have.
            Command::new(&python.interpreter)
                .args(["-m", "pip", "install", "--quiet", "--no-input"])
                .args(["--disable-pip-version-check", "--only-binary", ":all:"])
                .arg("--requirement")
                .arg(Path::new(ROOT).join("tests/python/requirements.txt")),
        );
        fs::create_dir_all(&python.generated).unwrap();
        run(
            "generate Python from the contract",
            Command::new(&python.interpreter)
                .args(["-m", "grpc_tools.protoc", "--proto_path", "proto"])
                .arg("--python_out")
                .arg(&python.generated)
                .arg("--grpc_python_out")
                .arg(&python.generated)
                .args(PROTO)
                .current_dir(ROOT),
        );
        // Last of all: without it the next run begins anew.
        fs::write(mark, made_of).unwrap();
        python
    }
}

fn made_of() -> String {
    let version = run(
        "ask Python for its version; install Python 3.9 or later with its module venv, for \
         example with: sudo apt-get install python3-venv",
        Command::new("python3").arg("--version"),
    );
    let mut all = String::from_utf8_lossy(&version.stdout).into_owned();
    let contract = PROTO.map(|file| Path::new("proto").join(file));
    for file in [PathBuf::from("tests/python/requirements.txt")]
        .iter()
        .chain(&contract)
    {
        all.push_str(&fs::read_to_string(Path::new(ROOT).join(file)).unwrap());
    }
    all
}

fn run(what: &str, command: &mut Command) -> Output {
    let output = command.output();
    match output {
        Ok(output) if output.status.success() => output,
        Ok(output) => panic!(
            "cannot {what}\n{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        ),
        Err(error) => panic!("cannot {what} ({error})"),
    }
}
