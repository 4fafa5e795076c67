//! PostgreSQL is stopped and killed under load and comes back: calls are UNAVAILABLE meanwhile,
//! everybody is ready again within 5 s, and nothing is half done.

use std::time::{Duration, Instant};

use handfast_proto::v1::MessageState;
use handfast_servers::{Error, Postgres};
use handfast_tests::clients::{Refused, message, orders};
use handfast_tests::{Engines, Floor, Servers, World, eventually};
use tonic::Code;

const SOON: Duration = Duration::from_secs(20);
const READY: Duration = Duration::from_secs(5);
const ORDERS: usize = 150;
const FACT: &str = "payment.completed";

/// Does this while everybody else goes on.
async fn change(world: &mut World, how: fn(&mut Postgres) -> Result<(), Error>) {
    let mut postgres = world.servers.postgres.take().expect("a server");
    let changed = tokio::task::spawn_blocking(move || {
        how(&mut postgres).unwrap_or_else(|error| panic!("{error}"));
        postgres
    });
    world.servers.postgres = Some(changed.await.unwrap());
}

fn is_kept(answer: Result<MessageState, Refused>) -> Result<(), String> {
    answer.map(drop).map_err(|refused| refused.message)
}

/// How the server goes down.
type Way = fn(&mut Postgres) -> Result<(), Error>;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_are_unavailable_while_postgresql_is_down_and_nothing_is_half_done() {
    let servers = Servers::own_postgres();
    let mut world = World::with_servers(Engines::Production, servers).await;
    world.start_all().await;
    let (payments, probe) = (world.payments(), world.raw("payment"));
    let orders = orders("a", ORDERS);
    let restarts = async {
        let ways: [Way; 2] = [Postgres::stop, Postgres::kill];
        for way in ways {
            let before = world.books().await.done.len();
            eventually("more was paid", SOON, async || {
                let paid = world.books().await.done.len();
                (paid >= before + 10)
                    .then_some(())
                    .ok_or_else(|| format!("{paid} after {before}"))
            })
            .await;
            change(&mut world, way).await;
            let code = match probe.try_prepare(&message(FACT)).await {
                Ok(Err(refused)) => refused.code,
                Err(status) => status.code(),
                Ok(Ok(state)) => panic!("{state:?} without a database"),
            };
            assert_eq!(code, Code::Unavailable);

            change(&mut world, Postgres::start_again).await;
            let back = Instant::now();
            let fact = message(FACT);
            eventually("a prepare is kept again", READY, async || {
                let kept = probe.try_prepare(&fact).await;
                is_kept(kept.map_err(|status| status.to_string())?)
            })
            .await;
            eventually("a cancel is kept again", READY, async || {
                let kept = probe.try_cancel(&fact.id).await;
                is_kept(kept.map_err(|status| status.to_string())?)
            })
            .await;
            assert!(back.elapsed() < READY, "took {:?}", back.elapsed());
            eprintln!("ready after {:?}", back.elapsed());
        }
    };
    let (paid, ()) = tokio::join!(payments.pay_all(&orders), restarts);
    assert_eq!(paid, (ORDERS * 4 / 5, ORDERS / 5));
    world.drained().await.hold(Floor {
        paid: ORDERS * 4 / 5,
        refused: ORDERS / 5,
        ..Floor::default()
    });
}
