//! PostgreSQL is there and refuses: it is read-only, has no connection, no lock or no room left.
//! Calls are UNAVAILABLE meanwhile, everybody is ready again within 5 s after it is over, and
//! nothing is half done.

use std::time::{Duration, Instant};

use handfast_servers::{Options, Postgres, SmallDisk};
use handfast_tests::clients::{message, orders};
use handfast_tests::{Engines, Floor, Servers, World, eventually};
use sqlx::{Connection as _, Executor as _, PgConnection};
use tonic::Code;

const SOON: Duration = Duration::from_secs(20);
const READY: Duration = Duration::from_secs(5);
const ORDERS: usize = 100;
const FACT: &str = "payment.completed";

/// A server with these settings of its own.
fn server(options: &Options) -> Servers {
    let postgres = Postgres::start_with(options);
    Servers {
        postgres: Some(postgres.unwrap_or_else(|error| panic!("{error}"))),
        ..Servers::default()
    }
}

/// Payments go on while the server begins to refuse, until calls are UNAVAILABLE, and while it
/// takes everything again.
async fn refuses_and_takes_again<T>(
    mut world: World,
    mut begin: impl AsyncFnMut(&Postgres) -> T,
    end: impl AsyncFnOnce(&Postgres, T),
) {
    world.start_all().await;
    let (payments, probe) = (world.payments(), world.raw("payment"));
    let postgres = world.servers.postgres.take().expect("a server");
    let orders = orders("a", ORDERS);
    let trouble = async {
        eventually("some were paid", SOON, async || {
            let paid = world.books().await.done.len();
            (paid >= 10).then_some(()).ok_or_else(|| paid.to_string())
        })
        .await;
        // What has room already may still be kept, so it is tried again and again.
        let mut facts = Vec::new();
        let (refusing, code) = eventually("a prepare is refused", SOON, async || {
            let refusing = begin(&postgres).await;
            let fact = message(FACT);
            let prepared = probe.try_prepare(&fact).await;
            facts.push(fact);
            match prepared {
                Ok(Ok(state)) => Err(format!("{state:?}")),
                Ok(Err(refused)) => Ok((refusing, refused.code)),
                Err(status) => Ok((refusing, status.code())),
            }
        })
        .await;
        assert_eq!(code, Code::Unavailable);

        end(&postgres, refusing).await;
        let over = Instant::now();
        // Nobody else knows of these, so they are decided by hand.
        for fact in &facts {
            eventually("the same prepare is kept", READY, async || {
                let kept = probe.try_prepare(fact).await;
                let kept = kept.map_err(|status| status.to_string())?;
                kept.map_err(|refused| refused.message)
            })
            .await;
            eventually("and cancelled", READY, async || {
                let cancelled = probe.try_cancel(&fact.id).await;
                let cancelled = cancelled.map_err(|status| status.to_string())?;
                cancelled.map_err(|refused| refused.message)
            })
            .await;
        }
        assert!(over.elapsed() < READY, "took {:?}", over.elapsed());
        eprintln!("ready after {:?}", over.elapsed());
    };
    let (paid, ()) = tokio::join!(payments.pay_all(&orders), trouble);
    assert_eq!(paid, (ORDERS * 4 / 5, ORDERS / 5));
    world.servers.postgres = Some(postgres);
    world.drained().await.hold(Floor {
        paid: ORDERS * 4 / 5,
        refused: ORDERS / 5,
        ..Floor::default()
    });
}

async fn connect(postgres: &Postgres) -> Result<PgConnection, sqlx::Error> {
    PgConnection::connect(&postgres.admin_url()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_may_not_be_written_is_unavailable_until_it_may() {
    let world = World::with_servers(Engines::Production, server(&Options::new())).await;
    let read_only = |postgres: &Postgres, on: &str| {
        let sql = format!("ALTER SYSTEM SET default_transaction_read_only = {on}");
        let set = postgres.sql("postgres", &sql);
        set.unwrap_or_else(|error| panic!("{error}"));
        let reload = postgres.sql("postgres", "SELECT pg_reload_conf()");
        reload.unwrap_or_else(|error| panic!("{error}"));
    };
    refuses_and_takes_again(
        world,
        async |postgres| read_only(postgres, "on"),
        async |postgres, ()| read_only(postgres, "off"),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_without_a_free_connection_is_unavailable_until_it_has_one() {
    let options = Options::new().with_settings(&[("max_connections", "60")]);
    let world = World::with_servers(Engines::Production, server(&options)).await;
    // Takes what is free, and ends the sessions of the service: it finds no other.
    let mut held = Vec::new();
    refuses_and_takes_again(
        world,
        async |postgres| {
            while let Ok(connection) = connect(postgres).await {
                held.push(connection);
            }
            let session = held.first_mut().expect("one was free");
            let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                        WHERE application_name = 'handfast'";
            session.execute(end).await.expect("they are ended");
            while let Ok(connection) = connect(postgres).await {
                held.push(connection);
            }
            // They end with the last look.
            std::mem::take(&mut held)
        },
        async |_, held| drop(held),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_without_a_free_lock_is_unavailable_until_it_has_one() {
    let few = [
        ("max_locks_per_transaction", "10"),
        ("max_connections", "60"),
    ];
    let options = Options::new().with_settings(&few);
    let world = World::with_servers(Engines::Production, server(&options)).await;
    refuses_and_takes_again(
        world,
        async |postgres| {
            let mut session = connect(postgres).await.expect("a session");
            let all = "SELECT pg_advisory_lock(n) FROM generate_series(1, 1000000) n";
            let full = session.execute(all).await.unwrap_err();
            assert!(full.to_string().contains("out of shared memory"), "{full}");
            session
        },
        async |_, session| drop(session),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_without_room_is_unavailable_until_it_has_some() {
    let disk = SmallDisk::mount(320).unwrap();
    let servers = server(&Options::new().within(disk.path()));
    let world = World::with_servers(Engines::Production, servers).await;
    refuses_and_takes_again(
        world,
        async |_| disk.fill().unwrap(),
        async |_, filler| std::fs::remove_file(filler).unwrap(),
    )
    .await;
}
